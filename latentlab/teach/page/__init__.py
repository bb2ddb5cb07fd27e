"""The playground of the book: the shipped model, run by the reader's browser."""
