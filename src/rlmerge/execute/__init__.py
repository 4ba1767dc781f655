"""Carries out a plan: inputs (read blocks), work (measure and merge a unit), journal, folder (where bytes go), local."""
