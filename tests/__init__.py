"""kbit's tests: a package, so that no other installed package called `tests` can take the name of its helpers."""
