"""The demo: a base and four RL-trained experts of a million parameters, shipped in the package, merged and measured.

`data/` holds the base and the experts as delta packs, with the command that makes each in `data/made.json`. They come
from `rlmerge lab run tiny`; `python -m rlmerge.demo.assets` took them from there.
"""
