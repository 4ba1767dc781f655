"""The demo: a base and four RL-trained experts of a million parameters, shipped in the package, merged and measured.

`data/` holds the base and the experts as delta packs, with the commands that made them in `data/made.json`. They come
from `rlmerge lab run tiny`; `python -m rlmerge.demo.assets ROOT` took them from there.
"""
