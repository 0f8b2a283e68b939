"""AOTInductor: what it builds, and how; `package` loads torch."""
