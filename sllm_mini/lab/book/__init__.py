"""The book: chapters with their recorded outputs, the systems they rebuild, a reference of the package, as a static site. Built by `make book`."""
