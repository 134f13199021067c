//! `mcwcfs`: mounts, packs and looks into compressed checkpoints.

fn main() -> std::process::ExitCode {
    mcwcfs::cli::mcwcfs()
}
