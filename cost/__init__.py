"""Does the arithmetic and keeps the books: pure functions and SQLite."""
