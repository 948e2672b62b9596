"""Import contracts of this project, in addition to those of import-linter."""

import grimp
from importlinter import Contract, ContractCheck, fields, output


class FaceContract(Contract):
    """Rooms are imported through their faces, and a face exports only its own room.

    A room is a subpackage, and its face is the `__init__`. Modules of `open_rooms` may be imported directly. The same
    applies to `doors`: modules that are not in their face because they need an optional package.
    """

    type_name = "faces"

    container = fields.StringField()
    open_rooms = fields.SetField(subfield=fields.StringField(), required=False, default=set())
    doors = fields.SetField(subfield=fields.StringField(), required=False, default=set())

    def check(self, graph: grimp.ImportGraph, verbose: bool) -> ContractCheck:
        """Check every import between two rooms."""
        broken = []
        for importer in sorted(graph.modules):
            for imported in sorted(graph.find_modules_directly_imported_by(importer)):
                room, other = self._room(importer), self._room(imported)
                if not room or not other or room == other or other in self.open_rooms or imported in self.doors:
                    continue
                if not graph.find_children(imported):
                    broken.append(f"{importer} imports {imported}; import it through its face")
                elif importer.count(".") == 1 and graph.find_children(importer) and room != "cli":
                    broken.append(f"the face {importer} imports {imported}; a face exports its own room alone")
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print each import that breaks the contract."""
        for line in check.metadata["broken"]:
            output.print_error(line)

    def _room(self, module: str) -> str:
        """Return the room of a module; empty for the container itself and for other packages."""
        inside = module.startswith(f"{self.container}.")
        return module.split(".")[1] if inside else ""
