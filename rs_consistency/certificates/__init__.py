"""The files of a certification: their lines, their record, what they prove and what they measure."""
