"""Teaching: what the lecture shows, asks and checks."""
