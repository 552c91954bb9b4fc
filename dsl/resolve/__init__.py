"""From trees and the catalog to a checked spec: includes, lets, clauses, checks."""
