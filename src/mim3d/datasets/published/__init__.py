"""Published data sets: their presets, layouts, folds and lists to pre-train on."""
