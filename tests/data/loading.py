"""`load_examples` with the fields of its settings as arguments."""

import dataclasses

from jaxtune import data


def load_examples(source, **options):
    names = {field.name for field in dataclasses.fields(data.DataSettings)}
    settings = data.DataSettings(**{key: options.pop(key) for key in names & options.keys()})
    return data.load_examples(source, settings, **options)
