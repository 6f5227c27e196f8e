//! Interrupts, timers and doorbells over KVM's in-kernel irqchip
