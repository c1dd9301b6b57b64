"""The names that plugin.py knows, without the packages that it imports."""

VALUES = {'nan': float('nan'), 'inf': float('inf'), 'huge': 1e30, 'spike': -30.0}
PLACES = ('forward', 'backward', 'update')
