"""Volta machine code (SASS): records of a cubin's instructions, and two models of how fast they run.

`listing` reads a cubin, `graph` finds its loops, `pipes` bounds it by the busiest pipe, `paths` follows the
control flow of a launch, and `simulate` issues what that executes cycle by cycle. Nothing here needs a GPU.
"""
