"""The Python functions of quark. `quarkcli` offers all of them and loads them at their first use."""

import warnings

with warnings.catch_warnings():
    # tqdm warns in a notebook without widgets, where it is first imported; libraries of ours import it.
    warnings.simplefilter("ignore")
    import tqdm.auto  # noqa: F401
