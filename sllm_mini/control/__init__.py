"""Where a request goes, how long a model stays, how many copies there are: one pure machine, events in and actions out.

No clock, thread, I/O or torch. The same controller runs under every driver of `cluster`. Taught in chapters 08 to 10.
"""
