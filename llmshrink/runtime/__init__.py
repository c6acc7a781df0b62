"""The packed model in torch: transformers' own modules, with compressed weights where its linears were."""
