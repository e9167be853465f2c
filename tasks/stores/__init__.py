"""Run stores beyond a folder: S3 and what speaks its protocol."""
