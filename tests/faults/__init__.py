"""Campaigns of faults: runs are killed, stopped, damaged and starved, then resumed and compared bit for bit."""
