"""From a corpus to token shards."""
