"""The methods of an [`EditableModel`] that manage its edits: undo, disable, compress, store, save and load them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..bases.fingerprint import check_edits_base, check_same_base, fingerprint_of
from ..bases.targets import Target, layers_of_same_kind, named_layers
from ..config import EditorConfig
from ..data.deprecation import renamed_method
from ..hub.files import EDITS_NAME
from ..hub.transfer import find_files
from .active import ActiveEdits
from .collection import Edits, chosen, with_enabled
from .compression import Compression, compressed
from .edit import (
    Edit,
    active_edits,
    check_required,
    each_base_delta_once,
    stacked,
    warn_of_no_scope,
    without_scopes,
)
from .edits_file import read_edits_file, write_edits_file
from .lora import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    check_adaptable,
    read_lora,
    warn_of_unloadable,
    write_lora,
)
from .low_rank import truncated
from .packing import uncollected
from .store import EditStore


class ActsWhileOwned:
    """
    Remove a model's edits from its base when no [`EditableModel`] owns them any more. Shallow copies own the same
    edits together; a deep copy or a pickle has its own.

    Args:
        active ([`ActiveEdits`]): The edits.
    """

    def __init__(self, active: ActiveEdits):
        self._active = active
        # At the interpreter's end there is nothing to clean up.
        weakref.finalize(self, active.discard).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._active,)


class CarriesEdits:
    """The methods of [`EditableModel`] that manage its edits, however they were made."""

    base_model: Any
    targets: list[Target]
    editor_config: EditorConfig
    _active: ActiveEdits
    _spent: str | None

    @property
    def edits(self) -> Edits:
        """
        The edits of the model, oldest first, to index, search and export. Of several edits of one prompt the last
        acts, and the others wait.
        """
        return Edits(self._active.edits)

    def undo(self, edit_id: str | None = None) -> Edit:
        """
        Take back an edit, the last one by default. The logits are then bit for bit those of the other edits alone,
        including one that it had superseded.

        Raises:
            KeyError: No edit has that id.
            IndexError: There is no edit to undo.
            ValueError: The edit is part of a compressed one.
        """
        self._check_usable()
        with self._active.changing():
            if not self._active.edits:
                raise IndexError("there is no edit to undo")
            return self._active.remove([self._active.edits[-1].id if edit_id is None else edit_id])[0]

    def undo_all(self) -> list[Edit]:
        """Take back all edits and return them."""
        self._check_usable()
        with self._active.changing():
            return self._active.remove([edit.id for edit in self._active.edits])

    def disable_edit(self, *edit_ids: str) -> None:
        """
        Disable edits until they are enabled again: they stay among [`~EditableModel.edits`], saved ones too, and the
        model answers bit for bit as if they were not there. [`~EditableModel.disable_edits`] disables all edits within
        a context.

        Args:
            edit_ids (`str`): The ids of the edits.

        Raises:
            KeyError: No edit has such an id; none is disabled.
            ValueError: An edit is part of a compressed one; none is disabled.
        """
        self._set_enabled(edit_ids, False)

    def enable_edit(self, *edit_ids: str) -> None:
        """
        Enable edits again: the model answers bit for bit as before they were disabled.

        Args:
            edit_ids (`str`): The ids of the edits.

        Raises:
            KeyError: No edit has such an id; none is enabled.
            ValueError: An edit is part of a compressed one; none is enabled.
        """
        self._set_enabled(edit_ids, True)

    turn_off = renamed_method("turn_off", "disable_edit")
    turn_on = renamed_method("turn_on", "enable_edit")

    def compress_edits(self, rank: int, keep: bool = True) -> Compression:
        """
        Make one edit of all that act: of each layer's sum, the nearest matrix of a rank (singular value
        decomposition).

        The edits that it replaces stay among [`~EditableModel.edits`] without effect, and an undo of the one brings
        them back bit for bit; until then they cannot be undone or disabled one by one. A later edit of a prompt of
        theirs is added to the one.

        Args:
            rank (`int`): The highest rank of a layer.
            keep (`bool`, defaults to `True`): Keep the edits that are replaced. Otherwise they are gone, and so are
                those that they had superseded: the one's undo leaves the model without any of them.

        Returns:
            [`~hf_mend.edits.compression.Compression`]: The new edit's id, and the relative error of each layer.

        Raises:
            ValueError: No edit acts, one has a scope, or the rank is below 1.
        """
        self._check_usable()
        with self._active.changing():
            edits, report = compressed(self._active.edits, rank, keep)
            self._active.replace(edits)
        return report

    def open_store(self, path: str | Path) -> list[Edit]:
        """
        Load the edits of a store on disk, and record all further changes of the model's edits in it: edits, undos,
        disabling and enabling, loading, compressing; not the temporary changes by `edited` and `carrying`.

        The store's edits come before those that the model has, which are appended to it. Edits that other processes
        append meanwhile stay, and the next model that opens the store has them.

        Args:
            path (`str` or `Path`): The store, see [`EditStore`]; the first edit creates it where it does not exist.

        Returns:
            `list[Edit]`: The store's edits.

        Raises:
            ValueError: It is damaged, or its edits are of another base model or in the model already; the model is as
                it was.
            IsADirectoryError: The path is a folder's.
            RuntimeError: A store is open already, or this is within `edited` or `carrying`, whose edits end with
                them.
        """
        self._check_usable()
        self._active.check_lasting("open_store")
        with self._active.changing(), uncollected():
            if self._active.store is not None:
                raise RuntimeError(f"the store {str(self._active.store.path)!r} is open; close_store() first")
            fingerprint, base_model = fingerprint_of(self.base_model, self.targets), self.base_model
            store = EditStore(path, fingerprint, lambda theirs: check_same_base(base_model, theirs, str(path)))
            edits = list(store.edits)
            check_same_base(base_model, store.base_fingerprint, str(path))
            self._active.check_fit(edits, path)
            self._active.open_store(store, each_base_delta_once([*edits, *self._active.edits]))
        return edits

    def close_store(self) -> None:
        """Stop recording changes in the store. The model's edits stay as they are."""
        with self._active.lock:
            self._active.store = None

    @contextmanager
    def disable_edits(self) -> Iterator[None]:
        """
        Disable all edits within the context, for the thread or asyncio task that is in it: there the model answers as
        if it had none.

        Raises:
            RuntimeError: The model has been merged or unloaded; a merged base has the edits in its weights.
        """
        self._check_usable()
        with self._active.disabled():
            yield

    @contextmanager
    def carrying(self, edits: Sequence[Edit]) -> Iterator[None]:
        """
        Make these edits the model's only ones within the context, for the thread or asyncio task that is in it: some
        of its own, say, or another user's. What is edited and undone there ends with it.

        Raises:
            ValueError: An edit does not fit this model.
        """
        self._check_usable()
        with self._active.draft():
            self._active.replace([])
            self._active.check_fit(edits, "these edits")
            self._active.replace(edits)
            yield

    # ---- files ----

    def save_edits(self, save_directory: str | Path) -> None:
        """
        Write the edits to `edits.safetensors` in a folder, all or nothing.

        Args:
            save_directory (`str` or `Path`): The folder; made if missing.

        Raises:
            RuntimeError: The model has been merged or unloaded, and carries no edits any more; the folder is as it
                was.
        """
        self._check_usable()
        write_edits_file(save_directory, self._active.edits, fingerprint_of(self.base_model, self._active.targets))

    def load_edits(self, edits_name_or_path: str | Path, *, scope: bool = True, **hub_kwargs: Any) -> list[Edit]:
        """
        Add saved edits to the model, bit for bit as they were saved.

        Args:
            edits_name_or_path (`str` or `Path`): A folder that `save_edits` wrote, or a repository's id on the Hub.
            scope (`bool`, defaults to `True`): Whether the edits keep their scopes, for which the model must have the
                editor that made them. Without them they act everywhere, as in merged weights.
            hub_kwargs: As for [`~EditableModel.from_pretrained`].

        Raises:
            FileNotFoundError: There are no edits.
            ValueError: The file is damaged, or its edits do not fit this model or are there already; nothing is
                loaded.
        """
        self._check_usable()
        path = find_files(edits_name_or_path, [EDITS_NAME], **hub_kwargs)[EDITS_NAME]
        edits, fingerprint = read_edits_file(path)
        check_edits_base(self.editor_config, self.base_model, fingerprint, str(path))
        if not scope:
            warn_of_no_scope(edits)
            edits = without_scopes(edits)
        return self._add(edits, path)

    def save_lora(
        self,
        save_directory: str | Path,
        edits: Sequence[Edit | str] | None = None,
        uniform_rank: bool = True,
        max_rank: int | None = None,
    ) -> float:
        """
        Write edits as a LoRA adapter that plain `PeftModel.from_pretrained` loads with the edited model's logits. An
        adapter has no scope: there the edits act everywhere.

        Args:
            save_directory (`str` or `Path`): The folder.
            edits (`Sequence[Edit | str]`, *optional*): The edits to write, or the ids of some that the model carries;
                all of these by default.
            uniform_rank (`bool`, defaults to `True`): Pad all layers to one rank, and write zeros for the layers of
                the same names in other blocks. Inference servers require it: some drop a kind of layer that is not in
                all blocks, or scale all layers by one rank. Without it, the file is smaller, and exact in PEFT alone.
            max_rank (`int`, *optional*): The highest rank of a layer; layers above it are truncated to it by SVD.

        Returns:
            `float`: The largest relative error (Frobenius norm) among the layers that were truncated, or 0.

        Raises:
            KeyError: No edit has such an id.
            ValueError: There is no edit, one requires a base delta that is missing or acts beside a block's experts,
                or `max_rank` is below 1.
            RuntimeError: The model has been merged or unloaded.
        """
        self._check_usable()
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"max_rank is {max_rank}, expected 1 or more")
        wanted = self._active.edits if edits is None else chosen(self._active.edits, edits)
        check_required(wanted, "save_lora")
        written = active_edits(wanted)
        warn_of_no_scope(written)
        updates, error = stacked(written), 0.0
        if max_rank is not None and any(len(u) > max_rank for u, _ in updates.values()):
            smaller = {name: truncated(update, max_rank) for name, update in updates.items()}
            updates, error = {name: one for name, (one, _) in smaller.items()}, max(e for _, e in smaller.values())
            written = []  # their rows are no longer apart
        check_adaptable(named_layers(self.base_model, updates))
        warn_of_unloadable(self.base_model, updates)
        write_lora(
            save_directory,
            self.targets,
            updates,
            self.editor_config.task_type,
            self.editor_config.base_model_name_or_path,
            layers_of_same_kind(self.base_model, updates) if uniform_rank else None,
            written,
        )
        return error

    def load_lora(self, lora_name_or_path: str | Path, **hub_kwargs: Any) -> list[Edit]:
        """
        Add a LoRA adapter to the model: as the edits that `save_lora` wrote, or, from elsewhere, as one edit without a
        prompt. Its layers may be any linear layers of the base model.

        Args:
            lora_name_or_path (`str` or `Path`): A folder with `adapter_config.json` and `adapter_model.safetensors`,
                or a repository's id on the Hub.
            hub_kwargs: As for [`~EditableModel.from_pretrained`].

        Returns:
            `list[Edit]`: The edits.

        Raises:
            FileNotFoundError: There is no adapter.
            ValueError: A file is damaged, the adapter is not plain LoRA on linear layers of this model (DoRA, biases,
                whole layers), or its edits are there already; nothing is loaded.
        """
        self._check_usable()
        files = find_files(lora_name_or_path, [ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME], **hub_kwargs)
        edits = read_lora(files[ADAPTER_CONFIG_NAME], files[ADAPTER_WEIGHTS_NAME], self.base_model)
        return self._add(edits, lora_name_or_path)

    def _add(self, edits: list[Edit], source: str | Path) -> list[Edit]:
        with self._active.changing():
            self._active.check_fit(edits, source)
            self._active.replace([*self._active.edits, *edits])
        return edits

    def _set_enabled(self, edit_ids: Sequence[str], enabled: bool) -> None:
        self._check_usable()
        with self._active.changing():
            self._active.replace(with_enabled(self._active.edits, edit_ids, enabled))

    def _check_usable(self) -> None:
        if self._spent is not None:
            raise RuntimeError(
                f"this model's {self._spent}; load the base model again and wrap it anew to edit further"
            )
