"""The generated pages of the documentation, from the declarations that the program itself runs on.

``python -m tools.docs`` rewrites them in a checkout; ``--check`` reports those that differ instead.
"""
