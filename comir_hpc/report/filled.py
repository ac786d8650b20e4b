"""Pages out of the templates of this package."""

from __future__ import annotations

from typing import Any

import jinja2


def filled(template: str, **shown: Any) -> str:
    """Fill one of the templates and return the page.

    Parameters
    ----------
    template : str
        Name of the file in ``report/template``.
    **shown
        What the template shows, by the names that it uses.

    Raises
    ------
    jinja2.UndefinedError
        If the template uses a name that was not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("comir_hpc.report", "template"),
        # Texts come from headers, file names and messages: none of them may become markup.
        autoescape=True,
        # A misspelt name would be an empty place on the page, which nobody notices.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**shown)
