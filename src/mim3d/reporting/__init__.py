"""Charts, images, tables and the page of a report (the name leaves `mim3d.report` to the command)."""
