"""The Python functions of quark. `quarkcli` offers all of them and loads them at their first use."""
