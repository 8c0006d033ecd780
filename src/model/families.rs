//! The model families, one row each: what a `config.json` leaves unsaid.
//!
//! A family is little: biases, norms on queries and keys, and a tied head follow from the tensors
//! that exist, the numbers from `config.json`. A row says only what cannot be seen there.

/// When `sliding_window` in a config means that a layer sees only the last tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// The family has no such key; where it is set, it means nothing.
    Ignored,
    /// Only if `use_sliding_window` is true, and only for layers from `max_window_layers` on.
    Switched {
        /// Tokens of the window where the config has none.
        default: usize,
        /// `max_window_layers` where the config has none.
        first: usize,
    },
    /// In every layer.
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
    /// What `sliding_window` means.
    pub window: Window,
    /// Positions of the first training where the config has none; `None`: all that it was made for.
    pub original_positions: Option<usize>,
    /// Whether layers have experts, and how a config speaks of them.
    pub experts: Mixture,
    /// Whether attention is by a latent that all heads share (MLA).
    pub latent: bool,
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
        window: Window::Switched {
            default: 4096,
            first: 28,
        },
        original_positions: None,
        experts: Mixture::None,
        latent: false,
    },
    Family {
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        head_dim: Some(128),
        window: Window::Switched {
            default: 4096,
            first: 28,
        },
        original_positions: None,
        experts: Mixture::None,
        latent: false,
    },
    Family {
        model_type: "qwen3_moe",
        architecture: "Qwen3MoeForCausalLM",
        head_dim: None,
        window: Window::Switched {
            default: 4096,
            first: 28,
        },
        original_positions: None,
        experts: Mixture::Qwen,
        latent: false,
    },
    Family {
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        head_dim: None,
        window: Window::Ignored,
        original_positions: None,
        experts: Mixture::None,
        latent: false,
    },
    Family {
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        head_dim: None,
        window: Window::Always {
            default: Some(4096),
        },
        original_positions: None,
        experts: Mixture::None,
        latent: false,
    },
    Family {
        model_type: "phi3",
        architecture: "Phi3ForCausalLM",
        head_dim: None,
        window: Window::Always { default: None },
        original_positions: Some(4096),
        experts: Mixture::None,
        latent: false,
    },
    Family {
        model_type: "deepseek_v3",
        architecture: "DeepseekV3ForCausalLM",
        head_dim: None,
        window: Window::Ignored,
        original_positions: None,
        experts: Mixture::DeepSeek,
        latent: true,
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
