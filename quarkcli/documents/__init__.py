"""JSON documents that others wrote: read as text, and checked for their shape once, before they are used."""
