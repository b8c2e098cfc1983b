"""Reads JSON documents that others wrote, and checks their shape once before they are used."""
