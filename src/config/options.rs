//! The command line that both daemons and the bench share.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

/// Options of a daemon.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct Options {
    /// YAML file with LMCache's pd_* keys and our own; the same file serves every model and rank.
    ///
    /// configs/sender.yaml and configs/receiver.yaml list every key with unit, default and consequence.
    /// An lmcache.yaml can be given as it is.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Sets one key, over what the file says; may be repeated, the last one counts. An empty value takes a key back.
    ///
    /// Lists are written as in YAML. Example: --set pd_buffer_size=8GiB --set 'pd_peer_init_port=[7300, 7301]'
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Tensor-parallel rank of the worker beside this daemon: its ports in lists by rank, its GPU for
    /// `pd_buffer_device: cuda`. Example: --rank 1 --tp-size 2
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub rank: u32,

    /// Number of tensor-parallel ranks: the model's KV heads are divided by it. 1 when left out.
    #[arg(long, value_name = "N")]
    pub tp_size: Option<u32>,

    /// The model's config.json as model hubs keep it beside the weights, or the folder that holds it; says how large a
    /// chunk is. Example: --model /models/Meta-Llama-3-8B/config.json
    #[arg(long, value_name = "CONFIG.JSON", conflicts_with = "kv_layout")]
    pub model: Option<PathBuf>,

    /// The model's name: peers with another name are refused. Left out: model_name in the YAML, or what the model's file
    /// says. Example: --model-name meta-llama/Meta-Llama-3-8B
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,

    /// The layout of a chunk itself, from a connector that knows its engine's tensors.
    ///
    /// A JSON file: {"model": "m", "dtype": "bfloat16", "layers": 32, "kv_heads": 8, "head_size": 128, "kv_planes": 2},
    /// with the KV heads of this rank; or {"model": "m", "chunk_bytes": 33554432, "chunk_tokens": 256}. A hybrid model has
    /// "groups": [{"name": "full", "layers": 8}, {"name": "sliding", "layers": 24}], with what they share at the top. A group
    /// of which every chunk has its whole length, the last one as well, says "whole": true.
    #[arg(long, value_name = "LAYOUT.JSON")]
    pub kv_layout: Option<PathBuf>,

    /// Prints the resolved configuration, every key with its value and unit, and exits: 0 when it can be used, 2 when
    /// it cannot.
    #[arg(long)]
    pub check: bool,

    /// Ends this daemon when the process that started it ends, however that happens.
    #[arg(long)]
    pub exit_with_parent: bool,
}

impl Options {
    /// The command line that gives these options again, for a daemon started on someone's behalf.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        let mut option = |name: &str, value: Option<OsString>| {
            if let Some(value) = value {
                // One word, so that a value that starts with a dash is not taken for an option.
                let mut word = OsString::from(format!("--{name}="));
                word.push(value);
                args.push(word);
            }
        };
        option("config", self.config.clone().map(Into::into));
        for assignment in &self.set {
            option("set", Some(assignment.into()));
        }
        option("rank", Some(self.rank.to_string().into()));
        option("tp-size", self.tp_size.map(|size| size.to_string().into()));
        option("model", self.model.clone().map(Into::into));
        option("model-name", self.model_name.clone().map(Into::into));
        option("kv-layout", self.kv_layout.clone().map(Into::into));
        if self.check {
            args.push("--check".into());
        }
        if self.exit_with_parent {
            args.push("--exit-with-parent".into());
        }
        args
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    /// A program.
    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn options_survive_their_way_through_a_command_line() {
        // Broken in production: the bench starts daemons with another configuration than it was given.
        Cli::command().debug_assert();
        let given = Options {
            config: Some("-c.yaml".into()),
            set: vec!["pd_buffer_size=1GiB".to_owned(), "pd_role=".to_owned()],
            rank: 1,
            tp_size: Some(2),
            model: Some("m/config.json".into()),
            model_name: Some("--odd name".to_owned()),
            kv_layout: None,
            check: true,
            exit_with_parent: true,
        };
        let words = std::iter::once(OsString::from("pd-sender")).chain(given.to_args());
        assert_eq!(Cli::try_parse_from(words).unwrap().options, given);
        let none = Cli::try_parse_from(["pd-sender"]).unwrap().options;
        assert_eq!(none, Options::default());
    }

    #[test]
    fn the_help_of_a_program_begins_with_what_it_is() {
        // Broken in production: `pd-sender --help` begins with a description of this struct.
        assert_eq!(Cli::command().get_about().unwrap().to_string(), "A program");
    }

    #[test]
    fn a_model_and_a_layout_exclude_each_other() {
        // Broken in production: one of the two is silently ignored.
        assert!(Cli::try_parse_from(["x", "--model", "a", "--kv-layout", "b"]).is_err());
    }
}
