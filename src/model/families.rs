//! The model families, one row each: what a `config.json` leaves unsaid.
//!
//! A family is little: biases, norms on queries and keys, and a tied head follow from the tensors
//! that exist, the numbers from `config.json`. A row says only what cannot be seen there.

/// When `sliding_window` in a config means that a layer sees only the last tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// The family has no such key; where it is set, it means nothing.
    Ignored,
    /// Only if `use_sliding_window` is true.
    Switched {
        /// Tokens of the window where the config has none.
        default: usize,
        /// `max_window_layers` where the config has none: the first layer with a window. None: every layer
        /// has it, whatever that key is.
        first: Option<usize>,
    },
    /// In every layer, whatever `use_sliding_window` is.
    Always {
        /// Tokens of the window where the config says nothing of it; null says that there is none.
        default: Option<usize>,
    },
}

/// What the configs of one family have in common.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// The value of `model_type`.
    pub model_type: &'static str,
    /// The entry of `architectures` that is a language model.
    pub architecture: &'static str,
    /// `head_dim` where the config has none; `None`: hidden size by heads.
    pub head_dim: Option<usize>,
    /// What attention is by.
    pub heads: Heads,
    /// What `sliding_window` means.
    pub window: Window,
    /// Whether `layer_types` says which layers have the window.
    pub layer_types: bool,
    /// Whether `partial_rotary_factor` means anything.
    pub partial_rotary: bool,
    /// Positions of the first training where the config itself, outside of its rope, has none; `None`: those of
    /// its rope, or all that it was made for.
    pub original_positions: Option<usize>,
    /// Whether layers have experts, and how a config speaks of them.
    pub experts: Mixture,
}

/// What a family's attention is by. Files show which of the first three: it counts where weights are made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heads {
    /// Heads without more.
    Plain,
    /// Queries, keys and values have biases.
    Biased,
    /// Each head's queries and keys have a norm.
    Normed,
    /// A latent that all heads share (MLA).
    Latent,
}

/// Whether a family has experts, by whose keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixture {
    /// It has none.
    None,
    /// By Qwen's keys: the best few of a softmax.
    Qwen,
    /// By `DeepSeek`'s keys: groups of sigmoids, a bias for the choice, experts that all tokens share.
    DeepSeek,
}

/// Every family that this version computes.
pub static FAMILIES: &[Family] = &[
    Family {
        model_type: "qwen2",
        architecture: "Qwen2ForCausalLM",
        head_dim: None,
        heads: Heads::Biased,
        window: Window::Switched {
            default: 4096,
            first: Some(28),
        },
        layer_types: true,
        partial_rotary: false,
        original_positions: None,
        experts: Mixture::None,
    },
    Family {
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        head_dim: Some(128),
        heads: Heads::Normed,
        window: Window::Switched {
            default: 4096,
            first: Some(28),
        },
        layer_types: true,
        partial_rotary: false,
        original_positions: None,
        experts: Mixture::None,
    },
    Family {
        model_type: "qwen3_moe",
        architecture: "Qwen3MoeForCausalLM",
        head_dim: None,
        heads: Heads::Normed,
        window: Window::Switched {
            default: 4096,
            first: None,
        },
        layer_types: false,
        partial_rotary: false,
        original_positions: None,
        experts: Mixture::Qwen,
    },
    Family {
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        head_dim: None,
        heads: Heads::Plain,
        window: Window::Ignored,
        layer_types: false,
        partial_rotary: false,
        original_positions: None,
        experts: Mixture::None,
    },
    Family {
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        head_dim: None,
        heads: Heads::Plain,
        window: Window::Always {
            default: Some(4096),
        },
        layer_types: true,
        partial_rotary: false,
        original_positions: None,
        experts: Mixture::None,
    },
    Family {
        model_type: "phi3",
        architecture: "Phi3ForCausalLM",
        head_dim: None,
        heads: Heads::Plain,
        window: Window::Always { default: None },
        layer_types: false,
        partial_rotary: true,
        original_positions: Some(4096),
        experts: Mixture::None,
    },
    Family {
        model_type: "deepseek_v3",
        architecture: "DeepseekV3ForCausalLM",
        head_dim: None,
        heads: Heads::Latent,
        window: Window::Ignored,
        layer_types: false,
        partial_rotary: false,
        original_positions: None,
        experts: Mixture::DeepSeek,
    },
];

/// The row of a `model_type`.
pub fn family(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|f| f.model_type == model_type)
}

/// The names of all families, for a message.
pub fn names() -> String {
    let names: Vec<_> = FAMILIES.iter().map(|f| f.model_type).collect();
    names.join(", ")
}
