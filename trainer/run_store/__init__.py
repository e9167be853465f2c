"""Named byte strings that outlive every node."""
