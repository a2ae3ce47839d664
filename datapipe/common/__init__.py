"""What every room uses: text, files, names, processes."""
