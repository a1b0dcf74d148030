"""Side-by-side measurements against what people run today; see README.md."""
