"""What the verbs leave on disk, typed: one record, one reader and one writer for each kind of file.

`model` is the model.json of a training run, `result` the result.json of a registration. `record` is what both have in
common, `folder` the check that a folder can be written to. `pictures` draws slices, `html` shows a result in a
notebook.
"""
