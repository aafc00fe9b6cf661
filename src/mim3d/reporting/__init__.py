"""The report room: pictures and the HTML page (its name leaves `mim3d.report` to the command)."""
