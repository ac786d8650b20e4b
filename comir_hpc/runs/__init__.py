"""What the verbs leave on disk, typed: one record, one reader and one writer for each kind of file.

`model` is the model.json of a training run, `result` the result.json of a registration, `diagnosis` the
diagnostics.json of `evaluate`; `record` is what they have in common. `folder` checks that a folder can be written to.
`pictures` draws slices, `html` and `result_html` show results in a notebook.
"""
