//! `mcwc-pack`: the same as `mcwcfs mcwc-pack`, for build pipelines.

fn main() -> std::process::ExitCode {
    mcwcfs::cli::mcwc_pack()
}
