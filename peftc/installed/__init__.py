"""Which packages are beside peftc: what it asks of them, what is there, and which releases the tests have run on.

Everything is read from metadata and from a file of records; no library is imported.
"""
