"""Records, their encoding to token ids, and readers of the field's layouts."""

from .deprecation import moved_names


__getattr__ = moved_names(
    __name__,
    {
        **dict.fromkeys(("EditBatch", "Encoder", "Query"), "encoding"),
        **dict.fromkeys(("EditDataset", "EditRecord"), "records"),
    },
)
