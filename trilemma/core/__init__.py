"""The nouns that everything else speaks: model, objective, score, data spec, codec, registry, errors."""
