module strata.io/integration/cluster/runc

go 1.26.0
