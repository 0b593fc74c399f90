"""Read run folders back and put them side by side: records, tables, pictures of learning.

Knows: the files of a run folder.  Does not know: models, memory, how a run is made.
"""
