"""The Python API. `quarkcli` offers all of it lazily; see `quarkcli.api.run` for examples."""
