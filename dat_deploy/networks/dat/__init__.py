"""DAT, DAT+ and DAT++: the family with deformable attention that this package began with."""
