"""Carries out a plan: inputs (read blocks), work (measure and merge a unit), journal, folder (the output), local."""
