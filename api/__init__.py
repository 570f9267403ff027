"""The HTTP edge. Merges that are computed while they are read have threads of their own, which OpenBLAS's, unless told
otherwise before numpy is imported, would hinder."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
