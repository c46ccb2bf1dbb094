"""What plugs kbit into other libraries. Nothing here is imported by the rest of the package, except `arm`."""
