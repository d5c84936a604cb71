"""What generates: rollout workers, revisers, the fleet. Imports vllm in one file only; never imports learner."""
