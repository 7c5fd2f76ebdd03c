"""Pure functions and records of sizes, times and orders: nothing here touches a tensor."""
