"""Planning: from offers and a workload to a ranked plan with its bill, risk and explanation."""
