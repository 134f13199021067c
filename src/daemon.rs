//! The mounted process: readiness, signals, shutdown.
